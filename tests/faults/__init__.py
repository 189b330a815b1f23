"""The rig behind ``tools/faults``: a device that speaks, the faults of a factory, a consumer that keeps the books."""
