"""The controller: a thin shell around the cluster's state machine. No Ray in it."""
