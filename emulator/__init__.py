"""The virtual disk: a graph of block nodes, drivers for image formats, a virtio-blk model, exports, QMP and the
daemon."""
