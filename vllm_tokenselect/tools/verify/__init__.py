"""`tokenselect verify`: whether a running server selects, agrees with full attention, and its speed."""
