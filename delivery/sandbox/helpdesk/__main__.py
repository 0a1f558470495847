"""``python -m delivery.sandbox.helpdesk --folder FOLDER``: one help desk in a process of its own.

Belongs here: the command line. Does not: what it starts (``server``). The token comes in SIGNALBOX_HELPDESK_TOKEN, since
arguments can be seen by everybody on the machine; ``client.HelpdeskSandbox`` writes the folder's world and starts this.
"""

import argparse
import os
import sys
from pathlib import Path

from delivery.sandbox.helpdesk import server

if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="python -m delivery.sandbox.helpdesk")
    options.add_argument("--folder", type=Path, required=True, help="holds world.json and the database")
    options.add_argument("--port", type=int, default=0, help="0: any free one; printed when ready")
    options.add_argument("--templates", type=Path, help="where the empty, migrated database is kept (default: folder)")
    options.add_argument("--with-parent", action="store_true", help="end when standard input ends")
    chosen = options.parse_args()
    given = os.environ.pop("SIGNALBOX_HELPDESK_TOKEN", "")
    if len(given) < 8:
        sys.exit("SIGNALBOX_HELPDESK_TOKEN: set the API's token (8 to 40 characters) in the environment")
    if chosen.with_parent:
        server.stop_with_parent()
    server.serve(
        chosen.folder.resolve(), chosen.port, given, templates=chosen.templates or chosen.folder,
        ready=lambda port: print(f"ready {port}", flush=True),
    )  # fmt: skip
