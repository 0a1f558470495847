"""The help desk's process: django-helpdesk behind waitress on 127.0.0.1, with the sandbox's controls beside it.

Belongs here: bringing the database up, the users and the token, serving. Does not: tickets (``desk``), faults (``watch``).
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from delivery.sandbox import private

THREADS = 8


def serve(folder: Path, port: int, token: str, *, templates: Path, ready: Callable[[int], None]) -> None:
    """Serve until the process ends. ``port`` 0: any free one; ``ready`` is told which, once requests are taken.

    templates: where an empty, migrated database is kept, so that only the first of many pays for the migrations.
    """
    os.environ["SIGNALBOX_HELPDESK_FOLDER"] = str(folder)
    os.environ["DJANGO_SETTINGS_MODULE"] = "delivery.sandbox.helpdesk.settings"
    import django

    django.setup()
    from django.core.wsgi import get_wsgi_application
    from waitress.server import create_server

    from delivery.sandbox.helpdesk import watch
    from delivery.sandbox.helpdesk.desk import Desk

    _database(folder / "helpdesk.sqlite3", templates)
    _users(token)
    watch.watch = watch.Watch(Desk(folder), token)
    application = get_wsgi_application()
    server = create_server(
        application, host="127.0.0.1", port=port, threads=THREADS, clear_untrusted_proxy_headers=True
    )
    ready(server.effective_port)
    server.run()


def stop_with_parent() -> None:
    """End this process when standard input ends, which it does however the parent ends."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _database(file: Path, templates: Path) -> None:
    if file.exists():
        private.database(file)
        return
    kept = templates / f"empty-helpdesk-{version('django-helpdesk')}-django-{version('django')}.sqlite3"
    draft = private.database(file.with_name(f".{file.name}.{os.getpid()}"))
    if kept.exists():
        shutil.copyfile(kept, draft)
    else:
        from django.core.management import call_command
        from django.db import connection

        asked = connection.settings_dict["NAME"]
        connection.settings_dict["NAME"] = str(draft)
        call_command("migrate", verbosity=0)
        connection.close()  # the last connection takes the write-ahead log into the file
        connection.settings_dict["NAME"] = asked
        templates.mkdir(parents=True, exist_ok=True)
        copy = private.database(kept.with_name(f".{kept.name}.{os.getpid()}"))
        shutil.copyfile(draft, copy)
        os.replace(copy, kept)
    with sqlite3.connect(draft) as database:
        database.execute("PRAGMA journal_mode=WAL")
    database.close()
    os.replace(draft, file)


def _users(token: str) -> None:
    """The connector's user with its token, and a person who changes tickets (their password is the token)."""
    from django.contrib.auth import get_user_model
    from rest_framework.authtoken.models import Token

    from delivery.sandbox.helpdesk.desk import PERSON, PUSHER

    users = get_user_model().objects
    pusher, _ = users.get_or_create(username=PUSHER, defaults={"is_staff": True})
    Token.objects.filter(user=pusher).exclude(key=token).delete()
    Token.objects.get_or_create(user=pusher, defaults={"key": token})
    person, new = users.get_or_create(username=PERSON, defaults={"is_staff": True, "is_superuser": True})
    if new:
        person.set_password(token)
        person.save()
