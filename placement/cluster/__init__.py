"""The cluster's state machine: events in, commands out; `state.ClusterState` is its one door."""
