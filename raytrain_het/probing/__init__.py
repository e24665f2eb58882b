"""Which machines are there, and how fast are they?"""
