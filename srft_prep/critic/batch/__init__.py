"""The providers' batch APIs: half the price, up to a day, jobs that a killed run finds again."""
