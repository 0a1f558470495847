"""Where things are: django-helpdesk and its API below helpdesk/, the sandbox's own controls below sandbox/.

Belongs here: paths. Does not: what stands behind them. Imported in the sandbox's own process alone.
"""

from django.contrib import admin
from django.contrib.staticfiles.views import serve
from django.urls import include, path, re_path

from delivery.sandbox.helpdesk.watch import controls

urlpatterns = [
    path("helpdesk/", include("helpdesk.urls")),
    path("admin/", admin.site.urls),
    path("sandbox/<str:what>", controls),
    re_path(r"^static/(?P<path>.*)$", serve, {"insecure": True}),
]
