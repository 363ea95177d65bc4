"""The qcow2 format: `header` and `geometry` (what bytes mean), `driver` and `image` (an image in use), `create`, `check`,
`repair`."""
