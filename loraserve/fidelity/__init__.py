"""How well the simulator predicts the live cluster: fitted on one load, scored on others."""
