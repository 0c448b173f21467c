"""What the policy `optimal` is made of: tiers of replicas, pools of holders inside them, spill."""
