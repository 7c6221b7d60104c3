"""From shards to minibatches: blocks on disk, the global order, neighbour pairs, statistics."""
