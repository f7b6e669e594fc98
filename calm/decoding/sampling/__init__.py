"""How the next chunk is chosen from draws of the head: temperature, voting, rejection, seeds."""
