//! Files that nobody writes by accident.

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
    #[allow(dead_code)] // by one of the two tests that include this
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
