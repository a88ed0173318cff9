"""The service's page: jobs, progress and curves, to look at with a browser."""

from server.certification.page.site import app

__all__ = ["app"]
