"""Pictures of what a plan kept."""

from .overlay import Cell as Cell
from .overlay import heatmap as heatmap
from .overlay import overlay as overlay
from .overlay import save_png as save_png
from .overlay import sheet as sheet
