//! A `.safetensors` file: tree → layout, file → index, both as for an HDF5 image, so that everything behind works for it.
//!
//! The file is 8 bytes (the header's length), the header (a JSON object: name → `dtype`, `shape`, `data_offsets`, and
//! `__metadata__` with strings), the values. As strict as the reference implementation: the values follow one another
//! without holes, and nothing is left over. What we write begins at a multiple of 64, as far as it can: the header is
//! padded with spaces, and tensors that keep the next one there come first.
#![forbid(unsafe_code)]

use crate::dtype::DType;
use crate::error::{Error, Kind, Result, try_with_capacity};
use crate::image::{ALIGNMENT, Engine, EngineKind, Found, Index, Layout, Storage};
use crate::io::ReadAt;
use crate::json::{self, Build, Encoder, Scalar, Text};
use crate::limits;
use crate::tree::{Attribute, Dataset, Tree};

/// The name of the entry that is no tensor; in a tree, the group whose attributes are the metadata.
const METADATA: &str = "__metadata__";

/// Lays out and indexes safetensors.
#[derive(Clone, Copy, Debug, Default)]
pub struct Safetensors;

impl Engine for Safetensors {
    fn kind(&self) -> EngineKind {
        EngineKind::Safetensors
    }

    fn lay_out(&self, tree: &Tree) -> Result<Layout> {
        lay_out(tree)
    }

    fn index(&self, image: &dyn ReadAt) -> Result<Index> {
        index(image)
    }

    fn read(&self, _image: &dyn ReadAt, _paths: &[&str], _out: &mut [&mut [u8]]) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "safetensors hold contiguous tensors only"))
    }
}

/// Header first, then the tensors.
fn lay_out(tree: &Tree) -> Result<Layout> {
    let datasets = tree.datasets();
    let mut order: Vec<usize> = (0..datasets.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse((datasets[i].nbytes.is_multiple_of(ALIGNMENT), datasets[i].dtype.size()))); // stable
    let mut header = Encoder::new();
    header.begin_dict();
    for group in tree.groups() {
        if &*group.path != METADATA {
            return Err(Error::new(Kind::Invalid, "safetensors files have no groups").with_entry(&group.path));
        }
        put_metadata(&group.attributes, &mut header)?;
    }
    let mut offsets = vec![None; datasets.len()];
    let mut at = 0;
    for i in order {
        put_tensor(&datasets[i], at, &mut header).map_err(|e| e.with_entry(&datasets[i].path))?;
        offsets[i] = (datasets[i].nbytes > 0).then_some(at);
        at += datasets[i].nbytes;
    }
    header.end_dict();
    let mut header = header.finish();
    let start = (header.len() as u64 + 8).next_multiple_of(ALIGNMENT);
    header.resize(start as usize - 8, b' ');
    if header.len() as u64 > limits::MAX_SAFETENSORS_HEADER_BYTES {
        return Err(Error::new(
            Kind::Invalid,
            "the names of these tensors do not fit into the header of a safetensors file",
        )
        .with_found(format_args!("at most {} bytes", limits::MAX_SAFETENSORS_HEADER_BYTES), header.len())
        .with_advice("Save in shards."));
    }
    header.splice(..0, (header.len() as u64).to_le_bytes());
    offsets.iter_mut().flatten().for_each(|offset| *offset += start);
    Ok(Layout { metadata: vec![(0, header)], offsets, len: start + at })
}

fn put_metadata(attributes: &[Attribute], header: &mut Encoder) -> Result<()> {
    header.str(METADATA);
    header.colon();
    header.begin_dict();
    for (name, value) in attributes {
        header.str(name);
        header.colon();
        header.str(
            value.text().ok_or_else(|| Error::new(Kind::Invalid, "safetensors metadata is text").with_entry(name))?,
        );
    }
    header.end_dict();
    Ok(())
}

/// The entry of a tensor that lies `at` bytes behind the header.
fn put_tensor(dataset: &Dataset, at: u64, header: &mut Encoder) -> Result<()> {
    if &*dataset.path == METADATA {
        return Err(Error::new(Kind::Invalid, "a tensor cannot have this name in a safetensors file"));
    }
    let tag = dataset.attributes.iter().find(|a| a.0 == "dtype").and_then(|a| a.1.text());
    let dtype = dataset.dtype.to_safetensors(tag).ok_or_else(|| {
        Error::new(Kind::Invalid, "safetensors files have no such dtype")
            .with_found("another", tag.map_or_else(|| dataset.dtype.name(), Into::into))
    })?;
    let list = |header: &mut Encoder, numbers: &[u64]| {
        header.begin_list();
        numbers.iter().for_each(|&n| header.int(n.cast_signed())); // below 1 << 60
        header.end_list();
    };
    header.str(&dataset.path);
    header.colon();
    header.begin_dict();
    header.str("dtype");
    header.colon();
    header.str(dtype);
    header.str("shape");
    header.colon();
    list(header, &dataset.shape);
    header.str("data_offsets");
    header.colon();
    list(header, &[at, at + dataset.nbytes]);
    header.end_dict();
    Ok(())
}

#[cold]
fn malformed(what: &str) -> Error {
    Error::new(Kind::Image, format!("malformed safetensors: {what}"))
        .with_advice("The file is damaged or of another format; use another copy.")
}

fn index(image: &dyn ReadAt) -> Result<Index> {
    let mut size = [0; 8];
    if image.len() < size.len() as u64 {
        return Err(malformed("it is too short").with_found("8 bytes at least", image.len()));
    }
    image.read_at(&mut size, 0)?;
    let size = u64::from_le_bytes(size);
    if size > limits::MAX_SAFETENSORS_HEADER_BYTES {
        return Err(Error::new(Kind::Limit, "the header of the safetensors file is too large")
            .with_found(format_args!("at most {} bytes", limits::MAX_SAFETENSORS_HEADER_BYTES), size));
    }
    let start = size + 8;
    if start > image.len() {
        return Err(truncated(start, image.len()));
    }
    let mut text = try_with_capacity(size as usize)?;
    text.resize(size as usize, 0);
    image.read_at(&mut text, 8)?;
    if !text.starts_with(b"{") {
        return Err(malformed("its header is no JSON object"));
    }
    let text = String::from_utf8(text).map_err(|_| malformed("its header is not UTF-8"))?;
    let limits = json::Limits { bytes: limits::MAX_SAFETENSORS_HEADER_BYTES, depth: 3, unique_keys: true };
    let header = json::decode(&text, &limits, &mut Header::default()).map_err(|e| match e.kind() {
        Kind::Json(_) => malformed(&format!("its header: {e}")),
        _ => e,
    })?;
    let Node::Dict(header) = header else { return Err(malformed("its header is no JSON object")) };
    let mut index = Index::default();
    let mut ends = Vec::new();
    let mut described = false;
    for (name, node) in header.into_entries() {
        if name == METADATA {
            if std::mem::replace(&mut described, true) {
                return Err(malformed("a name comes twice").with_entry(METADATA));
            }
            if !matches!(node, Node::Null) {
                index.attributes =
                    metadata(node).ok_or_else(|| malformed("its __metadata__ is no object of strings"))?;
            }
            continue;
        }
        let (found, end) = tensor(&name, node).map_err(|e| e.with_entry(&name))?;
        ends.push((found, end));
    }
    if ends.len() > limits::MAX_OBJECTS {
        return Err(Error::new(Kind::Limit, "too many tensors")
            .with_found(format_args!("at most {}", limits::MAX_OBJECTS), ends.len()));
    }
    contiguous(&mut ends, start, image.len())?;
    index.datasets = ends.into_iter().map(|(found, _)| found).collect();
    index.datasets.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    check_unique(index.datasets.iter().map(|d| &*d.path))?;
    check_unique(index.attributes.iter().map(|a| &*a.0))?;
    Ok(index)
}

#[cold]
fn truncated(wanted: u64, found: u64) -> Error {
    Error::new(Kind::Image, "the safetensors file is truncated")
        .with_found(format_args!("{wanted} bytes"), format_args!("{found} bytes"))
        .with_advice("It was cut short or is still being written; copy or save it again.")
}

/// Refuses sorted names of which two are equal.
fn check_unique<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
    match names.clone().zip(names.skip(1)).find(|(a, b)| a == b) {
        Some((name, _)) => Err(malformed("a name comes twice").with_entry(name)),
        None => Ok(()),
    }
}

/// Turns offsets from the start of the values into offsets in the file, if the values fill it from there to its end.
fn contiguous(tensors: &mut [(Found, u64)], start: u64, len: u64) -> Result<()> {
    let begin = |found: &Found| if let Storage::Contiguous(at) = found.storage { at } else { 0 };
    tensors.sort_unstable_by_key(|(found, end)| (begin(found), *end));
    let mut at = 0;
    for (found, end) in tensors.iter_mut() {
        let begin = begin(found);
        if begin != at {
            return Err(malformed("values overlap, or there is a hole between them")
                .with_found(format_args!("a start at {at}"), begin)
                .with_entry(&found.path));
        }
        at = *end;
        found.storage =
            if found.nbytes == 0 { Storage::Empty } else { Storage::Contiguous(begin.saturating_add(start)) };
    }
    match start.checked_add(at) {
        Some(wanted) if wanted == len => Ok(()),
        Some(wanted) if wanted < len => Err(malformed("bytes are left over").with_found(wanted, len)),
        wanted => Err(truncated(wanted.unwrap_or(u64::MAX), len)),
    }
}

/// The tensor that an entry of the header describes, at its offset from the start of the values, and its end.
fn tensor(name: &str, node: Node) -> Result<(Found, u64)> {
    if name.len() > limits::MAX_PATH_BYTES {
        return Err(Error::new(Kind::Limit, "a name is too long").with_found(limits::MAX_PATH_BYTES, name.len()));
    }
    let Node::Dict(dict) = node else { return Err(malformed("a tensor is no object")) };
    let [Some(Node::Text(dtype)), Some(Node::Sizes(shape)), Some(Node::Sizes(offsets))] = dict.fields else {
        return Err(malformed("a tensor lacks its dtype, shape or data_offsets"));
    };
    if shape.len() > limits::MAX_SAFETENSORS_RANK {
        return Err(Error::new(Kind::Limit, "a tensor has too many dimensions")
            .with_found(format_args!("at most {}", limits::MAX_SAFETENSORS_RANK), shape.len()));
    }
    let (dtype, tag) = DType::from_safetensors(&dtype).ok_or_else(|| {
        Error::new(Kind::Unsupported, "a dtype that cannot be read").with_found("one of whole bytes", dtype)
    })?;
    let &[begin, end] = &offsets[..] else { return Err(malformed("data_offsets are not two")) };
    let stored = end.checked_sub(begin).ok_or_else(|| malformed("data_offsets end before they begin"))?;
    let nbytes = dtype.nbytes(&shape).ok_or_else(|| malformed("a tensor's size overflows"))?;
    if nbytes != stored {
        return Err(malformed("a tensor's size does not match its data_offsets")
            .with_found(format_args!("{nbytes} bytes"), format_args!("{stored}")));
    }
    let attributes = tag.map(|tag| ("dtype".to_owned(), tag.into())).into_iter().collect();
    let storage = Storage::Contiguous(begin);
    Ok((Found { path: name.to_owned(), dtype, shape, nbytes, storage, attributes, object: 0 }, end))
}

fn metadata(node: Node) -> Option<Vec<Attribute>> {
    let Node::Dict(dict) = node else { return None };
    let text = |(key, value)| if let Node::Text(value) = value { Some((key, value.into())) } else { None };
    let mut all: Vec<Attribute> = dict.into_entries().map(text).collect::<Option<_>>()?;
    all.sort_unstable();
    Some(all)
}

/// A value of the header.
enum Node {
    Text(String),
    Size(u64),
    Sizes(Vec<u64>),
    Dict(Box<Dict>),
    Null,
    Other,
}

/// The fields of a tensor; their names need no memory.
const FIELDS: [&str; 3] = ["dtype", "shape", "data_offsets"];

#[derive(Default)]
struct Dict {
    fields: [Option<Node>; FIELDS.len()],
    others: Vec<(String, Node)>,
}

impl Dict {
    /// All of them, where the names mean nothing.
    fn into_entries(self) -> impl Iterator<Item = (String, Node)> {
        let fields = FIELDS.into_iter().zip(self.fields).filter_map(|(name, node)| Some((name.to_owned(), node?)));
        fields.chain(self.others)
    }
}

enum Key {
    Field(usize),
    Other(String),
}

/// Values of a list that are gathered before anybody looks at how many there are.
const MAX_LIST: usize = 1000;

/// Builds the header; memory stays in proportion to its text.
#[derive(Default)]
struct Header {
    pending: usize, // values that are in no list or dict yet
}

impl Header {
    fn value(&mut self, node: Node) -> Result<Node> {
        self.pending += 1;
        if self.pending > MAX_LIST {
            return Err(Error::new(Kind::Limit, "a list in the safetensors header is far too long").with_found(
                format_args!("at most {} dimensions", limits::MAX_SAFETENSORS_RANK),
                "a thousand and more",
            ));
        }
        Ok(node)
    }
}

fn text(text: Text) -> Result<String> {
    match text {
        Text::Utf8(s) => Ok(s.to_owned()),
        Text::Utf16(_) => Err(malformed("a string in its header is not Unicode")),
    }
}

impl Build for Header {
    type Value = Node;
    type Key = Key;
    type Dict = Box<Dict>;
    type Error = Error;

    fn scalar(&mut self, scalar: Scalar) -> Result<Node> {
        let node = match scalar {
            Scalar::Int(n) => u64::try_from(n).map_or(Node::Other, Node::Size),
            Scalar::IntText(digits) => digits.parse().map_or(Node::Other, Node::Size),
            Scalar::Text(t) => Node::Text(text(t)?),
            Scalar::Null => Node::Null,
            Scalar::Bool(_) | Scalar::Float(_) => Node::Other,
        };
        self.value(node)
    }

    fn list(&mut self, items: std::vec::Drain<Node>) -> Result<Node> {
        self.pending -= items.len();
        let sizes = items.map(|node| if let Node::Size(n) = node { Some(n) } else { None });
        let node = sizes.collect::<Option<_>>().map_or(Node::Other, Node::Sizes);
        self.value(node)
    }

    fn dict(&mut self) -> Box<Dict> {
        Box::default()
    }

    fn key(&mut self, key: Text) -> Result<Key> {
        let field = FIELDS.iter().position(|&name| key == Text::Utf8(name));
        field.map_or_else(|| text(key).map(Key::Other), |i| Ok(Key::Field(i)))
    }

    fn insert(&mut self, dict: &mut Box<Dict>, key: Key, value: Node) -> Result<bool> {
        self.pending -= 1;
        match key {
            Key::Field(i) => Ok(dict.fields[i].replace(value).is_none()),
            Key::Other(name) => {
                dict.others.push((name, value)); // that it is new is checked when all are there
                Ok(true)
            }
        }
    }

    fn finish(&mut self, dict: Box<Dict>) -> Result<Node> {
        self.value(Node::Dict(dict))
    }
}
