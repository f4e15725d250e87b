"""The network: layers, vision tower, text encoder, language model, DPE, CCE and their assembly."""
