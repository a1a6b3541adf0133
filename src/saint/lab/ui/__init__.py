"""A page on this machine on which a picture is pruned at once: `saint ui`."""

from .app import make_app as make_app
from .desk import Desk as Desk
from .desk import offered as offered
