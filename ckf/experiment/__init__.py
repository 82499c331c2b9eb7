"""An experiment: the same data, CF vectors and steps in several cells that differ in one thing."""

from ckf.experiment.cells import CELLS, Cell, chosen_cells
from ckf.experiment.runner import Experiment, make_experiment, run_experiment

__all__ = ["CELLS", "Cell", "Experiment", "chosen_cells", "make_experiment", "run_experiment"]
