"""Running a model: the cache's pages, the sampler, the engine, and how fast it is."""
