"""Did the student improve: rollouts of a benchmark read, arms compared, noise told from gain."""
