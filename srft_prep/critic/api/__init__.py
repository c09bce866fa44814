"""Critics behind an API: the driver that both providers' wire formats share."""
