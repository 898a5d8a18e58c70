"""Building blocks of the models: layers, masks, attention, blocks, losses. Single-device code, no data, no mesh."""
