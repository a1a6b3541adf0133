"""Engines that run models themselves: what a plan means in each of them."""
