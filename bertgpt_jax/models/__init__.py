"""Model families, one file each: config, module, published sizes. Single-device code; no data, mesh or training."""
