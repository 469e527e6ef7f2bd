"""``utils.visualization``."""

from sixfold.report.figures import TelemetryVisualizer, plot_hexagonal_grid

__all__ = ["TelemetryVisualizer", "plot_hexagonal_grid"]
