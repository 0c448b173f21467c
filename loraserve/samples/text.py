"""The text that the sample tokenizer is trained on and that the sample model babbles in.

Written for this package. It is plain, short and varied: about five hundred words, so that a byte-level BPE of
a thousand tokens comes out of it.
"""

CORPUS = """\
The harbour wakes before the town does. Fishermen untie their boats, check the nets and sail past the
lighthouse while gulls follow them out. By noon they return with silver herring, grey cod and a few crabs.
A child counts the baskets on the quay and writes each number in a blue notebook.
My grandmother keeps a bakery at the corner of the market square. She mixes flour, water, salt and patience.
The dough rests under a linen cloth until it doubles, then it is folded, shaped and left alone again.
When the oven is hot enough, the loaves go in, and soon the whole street smells of warm bread.
"Why do you never hurry?" I asked her once. "Because the bread knows," she said, and laughed.
In winter the river freezes and people skate from village to village. They carry letters, apples and news.
Spring brings heavy rain; the fields turn green, the roads turn brown, and every bridge hums with traffic.
Summer is long and dry. Autumn is short, golden and full of mushrooms.
A train leaves the station at seven. Its engine pulls nine wagons of coal, timber, wool and machine parts.
The driver watches the signals: green means go, yellow means slow down, red means stop at once.
Between two mountains the track climbs for eleven miles, crosses a stone viaduct and enters a dark tunnel.
Passengers close their books, look through the window and see only their own faces.
An old clock maker explained his work to me. Each wheel turns another wheel; each tooth must be exact.
If one part is too large, the whole clock runs late. If one part is too small, it does not run at all.
He measured a tiny spring, wrote down the result, and smiled as though he had found a coin.
The library holds forty thousand books on history, science, music, gardens, ships and stars.
Students read at long tables under green lamps. Someone whispers, someone sleeps, and a page falls down.
The librarian knows where everything belongs. She can find a map of the northern islands in under a minute.
To make soup for six people, chop two onions, three carrots and a handful of parsley. Add beans, pepper and
broth, then simmer gently for half an hour. Taste it before you serve it, because salt is easy to add and hard
to remove. Eat slowly and share what is left with your neighbours.
At night the sky above the desert is bright. Travellers name the stars and tell stories about hunters, bears,
queens and thieves. The fire burns low, the camels rest, and the wind draws lines in the sand.
A letter arrived on Tuesday. It had crossed an ocean, three borders and one very muddy garden. Inside was a
photograph of a wooden house, a dry leaf, and seven words: "Come back when the apple trees bloom."
The teacher wrote a question on the board: how many ways are there to carry water up a hill? Some pupils drew
buckets, some drew pumps, one drew a cloud. All of them were right, and the lesson lasted until the bell rang.
A small computer in the cellar counts the days. It adds, compares, stores and forgets. Nobody visits it, yet
every morning it prints a weather report: cloudy, light wind from the west, a fair chance of rain.
Music began quietly. First a single flute, then two violins, a drum, and finally the whole orchestra.
People put down their cups and listened. Even the dogs were silent until the last note disappeared.
Engineers say that a good bridge is boring. It stands, it carries, it waits. Nobody thanks it, and that is
how you know it works. Good software is much the same: it answers, it remembers, it recovers after a fall.
The carpenter chose oak for the table, ash for the handles and pine for the shelves. He planed the boards,
cut the joints, glued them and left everything under weights for a day and a night.
Please write a short story about a ship that finds an island made of glass. The captain was afraid to land,
so the cook rowed ashore alone with a lantern, a rope and a jar of honey. What happened is hard to believe.
What is the capital of the kingdom? Where does the river end? Who built the tower, and when will it fall?
Tell me about the sea. Tell me how the engine works. Explain why leaves change colour before they drop.
Hello, my name is Clara and I repair bicycles. Good morning, can you help me find the road to the lake?
Once upon a time a king asked three sisters to guard his garden. The eldest counted the roses, the second
counted the bees, and the youngest opened the gate, for she had understood that gardens are meant for guests.
"""
