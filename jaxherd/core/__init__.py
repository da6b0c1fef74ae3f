"""The ground floor: devices, meshes, sharding, the module seam, and what an experiment is."""
