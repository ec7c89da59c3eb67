"""The physics critic: a vision-language model judges whether a video obeys physics, from 1 to 5."""
