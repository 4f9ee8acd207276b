//! Files that nobody writes by accident.
#![allow(dead_code)] // each test that includes this uses some of it

/// Bytes of a node of a B-tree of groups, and how many children it has; see `docs/format.md`.
pub(crate) const GROUPS: Node = Node { kind: 0, key: 8, fan: 32 };

/// What the nodes of a B-tree look like.
#[derive(Clone, Copy)]
pub(crate) struct Node {
    kind: u8,
    key: usize,
    fan: usize,
}

impl Node {
    /// Those of the chunks of a dataset of so many dimensions.
    pub(crate) fn chunks(rank: usize) -> Self {
        Self { kind: 1, key: 8 + 8 * (rank + 1), fan: 64 }
    }
}

/// Puts so many levels on the root of a B-tree, a leaf; each has one node, all of whose children are the node below:
/// few bytes, and `fan` to the power of `levels` ways to the leaf, which may be made empty.
pub(crate) fn pyramid(mut image: Vec<u8>, node: Node, levels: u8, empty: bool) -> Vec<u8> {
    let Node { kind, key, fan } = node;
    let start = [&b"TREE"[..], &[kind, 0]].concat();
    let is_root = |at: &usize| {
        let leaf = &image[*at..];
        leaf.starts_with(&start) && leaf[6..8] != [0, 0] && leaf[8..24] == [0xff; 16]
    };
    let root = (0..image.len() - 24).find(is_root).expect("there is a B-tree of one node");
    let references: Vec<usize> =
        (0..image.len() - 8).filter(|&at| image[at..at + 8] == (root as u64).to_le_bytes()).collect();
    if empty {
        image[root + 6..root + 8].fill(0);
    }
    let mut below = root as u64;
    for level in 1..=levels {
        image.resize(image.len().next_multiple_of(8), 0);
        let at = image.len();
        image.extend([&b"TREE"[..], &[kind, level], &(fan as u16).to_le_bytes(), &[0xff; 16]].concat());
        for _ in 0..fan {
            image.extend(vec![0; key]);
            image.extend(below.to_le_bytes());
        }
        image.resize(at + 24 + fan * 8 + (fan + 1) * key, 0);
        below = at as u64;
    }
    for at in references {
        image[at..at + 8].copy_from_slice(&below.to_le_bytes());
    }
    let end = image.len() as u64;
    image[40..48].copy_from_slice(&end.to_le_bytes()); // the superblock's end of file
    image
}

/// An image that is put together piece by piece; its superblock comes last.
pub(crate) struct Image(Vec<u8>);

impl Image {
    pub(crate) fn new() -> Self {
        Self(vec![0; 96])
    }

    /// Appends, and says where that is.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> u64 {
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        let at = self.0.len() as u64;
        self.0.extend(bytes);
        at
    }

    /// An object header (version 1) that says how many links lead to it.
    pub(crate) fn object(&mut self, links: u32, messages: &[Vec<u8>]) -> u64 {
        let body = messages.concat();
        let head = [&[1, 0][..], &(messages.len() as u16).to_le_bytes(), &links.to_le_bytes(), &len(&body), &[0; 4]];
        self.put(&[head.concat(), body].concat())
    }

    /// A dataset of four bytes with more messages.
    pub(crate) fn dataset(&mut self, links: u32, more: &[Vec<u8>]) -> u64 {
        self.typed(links, &[0x10, 0, 0, 0, 4, 0, 0, 0, 0, 0, 32, 0], more) // u32
    }

    /// The same of another type.
    pub(crate) fn typed(&mut self, links: u32, kind: &[u8], more: &[Vec<u8>]) -> u64 {
        let value = self.put(b"1234");
        let layout = [&[3, 1][..], &value.to_le_bytes(), &4u64.to_le_bytes()].concat();
        let own = [message(1, &[1, 0, 0, 0, 0, 0, 0, 0]), message(3, kind), message(8, &layout)];
        self.object(links, &[&own[..], more].concat())
    }

    /// A group of a symbol table: `entries` are places of names in the heap, and objects.
    pub(crate) fn group(&mut self, links: u32, names: &[u8], entries: &[(u64, u64)]) -> u64 {
        let data = self.put(names);
        let heap =
            [&b"HEAP\0\0\0\0"[..], &(names.len() as u64).to_le_bytes(), &1u64.to_le_bytes(), &data.to_le_bytes()];
        let heap = self.put(&heap.concat());
        let mut children = Vec::new(); // each with its last name
        for part in entries.chunks(8) {
            let mut node = [&b"SNOD\x01\0"[..], &(part.len() as u16).to_le_bytes()].concat();
            for (name, object) in part {
                node.extend([&name.to_le_bytes()[..], &object.to_le_bytes(), &[0; 24]].concat());
            }
            node.resize(328, 0);
            children.push((part[part.len() - 1].0, self.put(&node)));
        }
        let mut level = 0;
        while level == 0 || children.len() > 1 {
            let below = std::mem::take(&mut children);
            let mut parts: Vec<&[(u64, u64)]> = below.chunks(32).collect();
            parts.extend(below.is_empty().then_some(&[][..]));
            for part in parts {
                let mut node =
                    [&b"TREE\0"[..], &[level], &(part.len() as u16).to_le_bytes(), &[0xff; 16], &[0; 8]].concat();
                for (name, child) in part {
                    node.extend([child.to_le_bytes(), name.to_le_bytes()].concat());
                }
                node.resize(24 + 65 * 8, 0);
                children.push((part.last().map_or(0, |last| last.0), self.put(&node)));
            }
            level += 1;
        }
        let tree = children[0].1;
        self.object(links, &[message(0x11, &[tree.to_le_bytes(), heap.to_le_bytes()].concat())])
    }

    /// The image, with that group for its root.
    pub(crate) fn finish(mut self, root: u64) -> Vec<u8> {
        self.put(&[]);
        let end = self.0.len() as u64;
        self.0[..16].copy_from_slice(b"\x89HDF\r\n\x1a\n\0\0\0\0\0\x08\x08\0");
        self.0[16..24].copy_from_slice(&[4, 0, 16, 0, 0, 0, 0, 0]);
        for (at, number) in [(24, 0), (32, u64::MAX), (40, end), (48, u64::MAX), (64, root)] {
            self.0[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        self.0
    }
}

fn len(bytes: &[u8]) -> [u8; 4] {
    (bytes.len() as u32).to_le_bytes()
}

/// A message of an object header.
pub(crate) fn message(kind: u16, data: &[u8]) -> Vec<u8> {
    flagged(kind, 0, data)
}

/// The same with flags.
pub(crate) fn flagged(kind: u16, flags: u8, data: &[u8]) -> Vec<u8> {
    let mut data = data.to_vec();
    data.resize(data.len().next_multiple_of(8), 0);
    [&kind.to_le_bytes()[..], &(data.len() as u16).to_le_bytes(), &[flags, 0, 0, 0], &data].concat()
}

/// An attribute message: a type, so many elements, their bytes.
pub(crate) fn attribute(name: &str, kind: &[u8], count: u64, value: &[u8]) -> Vec<u8> {
    let padded = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    };
    let (name, space) = (format!("{name}\0"), [&[1, 1, 0, 0, 0, 0, 0, 0][..], &count.to_le_bytes()].concat());
    let sizes = [name.len() as u16, kind.len() as u16, space.len() as u16].map(u16::to_le_bytes).concat();
    let data = [&[1, 0][..], &sizes, &padded(name.as_bytes()), &padded(kind), &space, value].concat();
    message(0x0c, &data)
}

/// The types of strings of one byte, and of any length.
pub(crate) const STRING: [u8; 8] = [0x13, 1, 0, 0, 1, 0, 0, 0];
pub(crate) const ANY_STRING: [u8; 16] = [0x19, 1, 1, 0, 16, 0, 0, 0, 0x13, 0, 0, 0, 1, 0, 0, 0];

/// Names of five letters, and where they are.
pub(crate) fn names(n: usize) -> (Vec<u8>, Vec<u64>) {
    let heap = [vec![0; 8], (0..n).flat_map(|i| format!("{i:05}\0\0\0").into_bytes()).collect()].concat();
    (heap, (1..=n as u64).map(|i| 8 * i).collect())
}

/// Small files that lead to the same places again and again, by every kind of pointer there is: what each asks for is
/// far beyond its size.
pub(crate) fn bombs() -> Vec<(&'static str, Vec<u8>)> {
    let mut all = Vec::new();
    let (heap, places) = names(20_000);
    let named = |object: u64| -> Vec<(u64, u64)> { places.iter().map(|&place| (place, object)).collect() };

    for (what, length) in [("one name that is too long", 1_000_000), ("one long name", 16_000)] {
        let mut image = Image::new();
        let name = [&[0; 8][..], &vec![b'a'; length - 9], &[0]].concat();
        let entries = vec![(8, 96); 60_000];
        let root = image.group(1, &name, &entries);
        all.push((what, image.finish(root)));
    }
    let mut image = Image::new();
    let object = image.dataset(1, &[]);
    let ends: Vec<(u64, u64)> = (0..16_000).map(|i| (16_007 - i, object)).collect();
    let root = image.group(1, &[&[0; 8][..], &[b'a'; 16_000], &[0]].concat(), &ends);
    all.push(("ends of one name", image.finish(root)));

    // One header, with rows of strings, at many links; the file says the number of links, or that it is one.
    let rows = |n: usize| -> Vec<Vec<u8>> {
        (0..n).map(|i| attribute(&format!("n{i}"), &STRING, 60_000, &vec![b'a'; 60_000])).collect()
    };
    for (what, links) in [("a header with many names", 20_000), ("a header with many names that it denies", 1)] {
        let mut image = Image::new();
        let object = image.dataset(links, &rows(6));
        let root = image.group(1, &heap, &named(object));
        all.push((what, image.finish(root)));
    }
    let mut image = Image::new();
    let object = image.dataset(1, &rows(60));
    let root = image.group(1, &[0, 0, 0, 0, 0, 0, 0, 0, b'x', 0], &[(8, object)]);
    all.push(("rows of strings of one byte", image.finish(root)));

    // A row whose strings are all the same, in a heap of strings.
    let mut image = Image::new();
    let object = [&1u16.to_le_bytes()[..], &[0; 6], &60_000u64.to_le_bytes(), &vec![b'a'; 60_000]].concat();
    let size = 16 + object.len() as u64 + 16;
    let heap_at = image.put(&[&b"GCOL\x01\0\0\0"[..], &size.to_le_bytes(), &object, &[0; 16]].concat());
    let reference = [&60_000u32.to_le_bytes()[..], &heap_at.to_le_bytes(), &1u32.to_le_bytes()].concat();
    let row = attribute("row", &ANY_STRING, 4_000, &reference.repeat(4_000));
    let object = image.dataset(1, &[row]);
    let root = image.group(1, &[0, 0, 0, 0, 0, 0, 0, 0, b'x', 0], &[(8, object)]);
    all.push(("a row of one string", image.finish(root)));

    // Groups that hold the next one twice: 2 to the power of their number.
    for (what, links) in [("groups in groups", 2), ("groups in groups that deny it", 1)] {
        let mut image = Image::new();
        let (heap, places) = names(2);
        let mut below = image.group(links, &heap, &[]);
        for _ in 0..60 {
            below = image.group(links, &heap, &[(places[0], below), (places[1], below)]);
        }
        all.push((what, image.finish(below)));
    }

    // Headers with thousands of continuations, at many links.
    let mut image = Image::new();
    let more: Vec<_> = (0..4_000u64).map(|i| message(0x10, &[i.to_le_bytes(), [0; 8]].concat())).collect();
    let object = image.dataset(1, &more);
    let root = image.group(1, &heap, &named(object));
    all.push(("continuations", image.finish(root)));

    // As small as links get: messages of a header.
    let mut image = Image::new();
    let object = image.dataset(200_000, &[]);
    let link =
        |i: u32| message(6, &[&[1, 0, 4][..], &i.to_be_bytes().map(|b| b'a' + b % 26), &object.to_le_bytes()].concat());
    let mut links = vec![message(2, &[&[0; 2][..], &[0xff; 16]].concat())];
    links.extend((0..26 * 26 * 26).map(|i| link(((i / 26 / 26) << 16) | ((i / 26 % 26) << 8) | (i % 26))));
    let root = image.object(1, &links);
    all.push(("links in a header", image.finish(root)));

    // A group of a group of a group, under a long name: each path is long.
    let mut image = Image::new();
    let object = image.dataset(1, &[]);
    let (inner, places) = names(20_000);
    let entries: Vec<(u64, u64)> = places.iter().map(|&place| (place, object)).collect();
    let below = image.group(1, &inner, &entries);
    let root = image.group(1, &[&[0; 8][..], &[b'a'; 16_000], &[0]].concat(), &[(8, below)]);
    all.push(("long paths", image.finish(root)));
    all
}

/// Headers of safetensors files that stand for as many objects as possible.
pub(crate) fn headers() -> Vec<(&'static str, Vec<u8>)> {
    let file = |text: String| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let many = |part: &dyn Fn(usize) -> String| {
        let parts: Vec<_> = (0..200_000).map(part).collect();
        file(format!("{{{}}}", parts.join(",")))
    };
    vec![
        ("empty objects", many(&|_| "\"\":{}".into())),
        ("objects in an object", file(format!("{{\"a\":{{{}}}}}", vec!["\"\":{}"; 200_000].join(",")))),
        ("numbers", many(&|_| "\"\":1".into())),
        ("empty lists", many(&|_| "\"\":[]".into())),
        ("metadata", file(format!("{{\"__metadata__\":{{{}}}}}", vec!["\"\":\"\""; 200_000].join(",")))),
        ("empty tensors", many(&|i| format!("\"{i:x}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}"))),
    ]
}
