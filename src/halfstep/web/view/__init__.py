"""What lies in folders, as pages: stores of latents, recorded runs, training runs and streamed runs."""

from halfstep.web.view.app import view_app

__all__ = ["view_app"]
