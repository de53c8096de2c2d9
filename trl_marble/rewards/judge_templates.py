# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What judges are asked. The wording is our own; `{prompt}` is replaced by the prompt of the images."""

# UnifiedReward was trained with the names of the two criteria, the scale, 'Final Score:' and the last line (pointwise
# scoring of image generation).
UNIFIED_REWARD_TEMPLATE = """\
You see an image that was generated from a text caption. Evaluate this image on two key criteria:
1. Alignment with the Caption: does the image show what the caption asks for? Look at the objects, their attributes \
and how they relate to each other.
2. Overall Image Quality: does the image look good? Look at clarity, fine detail, accurate colors and aesthetic appeal.
Weigh both criteria and assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""

YES_NO_TEMPLATE = """\
Does the image show all of the following, with the right objects, numbers, colors and places? [{prompt}]
Answer with one word, Yes or No."""

ARTIFACT_TEMPLATE = """\
You see an image that a generator made for the caption [{prompt}]. Judge only how free it is of artifacts: faults \
that a photographer or an illustrator would not make. Beauty and how well it fits the caption do not count, and what \
the caption asks for is no artifact.
Look at each of these in turn:
1. Bodies: hands and fingers, limbs, faces, eyes and teeth that are too many, missing, fused or bent as no body bends.
2. Objects: things that melt into each other, end in the air, are cut through, or repeat where they should not.
3. Writing: letters that are no letters, or words that fall apart.
4. Space: shadows, reflections, perspective and horizons that contradict each other.
5. Surface: noise, grids, rings, seams, smeared texture, colors that are burnt out.
Name in a few words what you found. Then give a score from 1 to 5 after 'Final Score:'. 5: no artifact, also when you \
look closely. 4: a small one that most people miss. 3: one that people see at a second look. 2: one that is seen at \
once. 1: several, or one that spoils the image."""

PAIR_TEMPLATE = """\
You see two images that were generated from the same caption: [{prompt}]
Which of them is better? First comes what the caption asks for: objects, numbers, attributes, places. Where both show \
it equally well, the one wins that looks better and has fewer faults.
Give your reasons in a few words. Then write as the last line 'Better image: 1', 'Better image: 2', or \
'Better image: tie' if you see no difference."""

RANKING_TEMPLATE = """\
You see {number} images that were generated from the same caption: [{prompt}]
Order them from the best to the worst. First comes what the caption asks for: objects, numbers, attributes, places. \
Among images that show it equally well, those come first that look better and have fewer faults.
Give your reasons in a few words. Then write as the last line 'Ranking:' and the numbers of all images with '>' \
between them, such as 'Ranking: 2 > 3 > 1'. Write '=' instead of '>' between images that are equally good."""
