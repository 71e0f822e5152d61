"""Several ReLUs in the place of one smooth gate: where their hinges lie, and the wider layers that hold them."""
