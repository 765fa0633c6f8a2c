"""The method's operations: readable PyTorch oracles and the implementations that are served."""
