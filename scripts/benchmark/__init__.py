"""What ``scripts/bench`` is made of: `workloads` (what is measured), `images`, `servers` (whom), `measure` (how), `report` and
`picture` (what is shown)."""
