"""Can this run learn, and will it fit? What can be known before a run, without opening one."""
