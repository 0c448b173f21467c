"""Which holder serves a request: what routers see, the policies, early refusal."""
