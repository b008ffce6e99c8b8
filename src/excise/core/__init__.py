"""The nouns everything else uses: configuration, errors, events, stages."""
