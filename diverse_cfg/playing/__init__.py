"""The page where a musician hears the difference: `player` samples, `takes` keeps what was heard, `page` shows it."""
