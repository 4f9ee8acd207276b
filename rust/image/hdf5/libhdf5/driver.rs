//! A virtual file driver: the C library's "file" is a [`ReadAt`] (read-only) or pages in memory (while laying out).
#![allow(unsafe_code)] // callbacks of a C library: raw pointers in, raw pointers out

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashSet};
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use hdf5_metno_sys::h5::{haddr_t, herr_t};
use hdf5_metno_sys::h5fd::{H5FD_FEAT_ACCUMULATE_METADATA, H5FD_FEAT_AGGREGATE_METADATA, H5FD_mem_t};
use hdf5_metno_sys::h5i::hid_t;
use hdf5_metno_sys::h5p::H5Pget_driver_info;

use crate::error::{Error, Kind, Result};
use crate::io::ReadAt;
use crate::limits;

/// The only name that opens; the library passes others for external links and virtual datasets.
pub(super) const NAME: &CStr = c"hornbeam";
const PAGE: usize = 4096;
/// What the library reads first of a global heap (`H5HG_MINSIZE`).
const HEAP: usize = 4096;

/// What the library takes for a file.
pub(super) struct Disk<'a> {
    image: Option<&'a dyn ReadAt>,
    pages: RefCell<BTreeMap<u64, Box<[u8; PAGE]>>>, // by offset; only what was written, so payload costs nothing
    end: Cell<u64>,
    opened: Cell<bool>,
    chunk: Cell<(*const c_void, usize)>, // what `placed_at` waits for
    placed_at: Cell<Option<u64>>,
    rank: Cell<usize>,               // of the dataset that is looked at
    nodes: RefCell<HashSet<u64>>,    // of B-trees that were checked
    children: RefCell<HashSet<u64>>, // of all of them
    error: RefCell<Option<Error>>,   // an error of `image`, until the library has returned
}

impl Default for Disk<'_> {
    fn default() -> Self {
        Self {
            image: None,
            pages: RefCell::default(),
            end: Cell::new(0),
            opened: Cell::new(false),
            chunk: Cell::new((ptr::null(), 0)),
            placed_at: Cell::new(None),
            rank: Cell::new(0),
            nodes: RefCell::default(),
            children: RefCell::default(),
            error: RefCell::new(None),
        }
    }
}

impl<'a> Disk<'a> {
    /// A file that can only be read.
    pub(super) fn over(image: &'a dyn ReadAt) -> Self {
        Self { image: Some(image), ..Self::default() }
    }

    /// Says of what rank the dataset is whose chunks the library looks up next.
    pub(super) fn expect_rank(&self, rank: usize) {
        self.rank.set(rank);
    }

    /// The error that made a call fail, if it is one of this crate's.
    pub(super) fn take_error(&self) -> Option<Error> {
        self.error.take()
    }

    /// Where `write` has the library write `chunk`, which is noted and not kept.
    pub(super) fn place(&self, chunk: &[u8], write: impl FnOnce() -> Result<()>) -> Result<u64> {
        self.chunk.set((chunk.as_ptr().cast(), chunk.len()));
        let written = write();
        self.chunk.set((ptr::null(), 0));
        let at = self.placed_at.take();
        written?;
        at.ok_or_else(|| Error::new(Kind::Image, "the HDF5 library did not write a chunk"))
    }

    /// What it holds; it is empty then.
    pub(super) fn take(&self) -> Self {
        let taken = Self::default();
        self.pages.swap(&taken.pages);
        taken.end.set(self.end.take());
        taken
    }

    /// Bytes of the file so far.
    pub(super) fn len(&self) -> u64 {
        self.end.get()
    }

    /// Everything that was written, by offset, and the length of the file.
    pub(super) fn into_pages(self) -> (impl Iterator<Item = (u64, Box<[u8; PAGE]>)>, u64) {
        (self.pages.into_inner().into_iter(), self.end.get())
    }

    fn read(&self, kind: c_int, at: u64, out: &mut [u8]) -> Result<()> {
        let Some(image) = self.image else {
            let pages = self.pages.borrow();
            each_page(at, out.len(), |page, within, range| match pages.get(&page) {
                Some(bytes) => out[range].copy_from_slice(&bytes[within]),
                None => out[range].fill(0),
            });
            return Ok(());
        };
        image.read_at(out, at)?;
        let metadata = kind != H5FD_mem_t::H5FD_MEM_DRAW as c_int;
        match out.first_chunk() {
            Some(b"GCOL") if out.len() == HEAP => check_heap(image, at, out), // which it calls raw data
            Some(b"TREE") if metadata => self.check_tree(at, out),
            Some(b"BTHD") if metadata && number(out, 12) as u16 > limits::MAX_BTREE_LEVELS.into() => {
                Err(Error::new(Kind::Image, "B-tree is too deep"))
            }
            Some(b"FAHD") if metadata => check_array(image, number(out, 8)),
            Some(b"EAHD") if metadata => check_array(image, number(out, 44)),
            _ => Ok(()),
        }
    }

    /// Refuses a B-tree that leads to the same place on two ways: with some nodes that share their children, the library
    /// would not come back in this life. What it has read before, it keeps or reads again.
    fn check_tree(&self, at: u64, node: &[u8]) -> Result<()> {
        let damaged = |what: &str| Err(Error::new(Kind::Image, format!("B-tree is damaged: {what}")));
        let (kind, level, count) = (number(node, 4) as u8, number(node, 5) as u8, number(node, 6) as u16);
        if level > limits::MAX_BTREE_LEVELS {
            return damaged("it is too deep");
        }
        if !self.nodes.borrow_mut().insert(at) {
            return Ok(());
        }
        // Keys of groups are offsets of names; those of chunks a size, a mask, and an index for each dimension and one.
        let key = if kind == 0 { 8 } else { 8 + 8 * (self.rank.get() + 1) };
        let mut children = self.children.borrow_mut();
        for i in 0..usize::from(count) {
            if !children.insert(number(node, 24 + i * (key + 8) + key)) {
                return damaged("it leads to the same place twice");
            }
        }
        Ok(())
    }

    fn write(&self, at: u64, data: &[u8]) -> Result<()> {
        if self.image.is_some() {
            return Err(Error::new(Kind::Image, "the HDF5 library tried to write to a file opened for reading"));
        }
        let mut pages = self.pages.borrow_mut();
        each_page(at, data.len(), |page, within, range| {
            pages.entry(page).or_insert_with(|| Box::new([0; PAGE]))[within].copy_from_slice(&data[range]);
        });
        Ok(())
    }

    /// Runs one callback: an error is kept for the caller, a panic becomes one, and nothing unwinds into C.
    fn guard(&self, f: impl FnOnce() -> Result<()>) -> herr_t {
        let panicked = |_| Err(Error::new(Kind::Internal, "reading the file panicked"));
        match catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(panicked) {
            Ok(()) => 0,
            Err(e) => {
                self.error.borrow_mut().get_or_insert(e);
                -1
            }
        }
    }
}

/// The eight bytes at `at` as a number; zero where there are none.
fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes.get(at..).and_then(<[u8]>::first_chunk).unwrap_or(&[0; 8]))
}

/// Refuses an array of chunks that no such image can have: the library looks at every entry.
fn check_array(image: &dyn ReadAt, entries: u64) -> Result<()> {
    let most = image.len() / 8 + limits::MAX_EMPTY_CHUNKS;
    if entries > most {
        return Err(
            Error::new(Kind::Limit, "an index has too many chunks").with_found(format_args!("at most {most}"), entries)
        );
    }
    Ok(())
}

/// Refuses a global heap (which holds the string attributes) whose objects do not follow each other: HDF5 2.2.0 never
/// comes back from one with an object of no size. `start` is what the library reads first of it.
fn check_heap(image: &dyn ReadAt, at: u64, start: &[u8]) -> Result<()> {
    let damaged = || Error::new(Kind::Image, "global heap is damaged");
    let size = number(start, 8);
    if size > limits::MAX_HEADER_BYTES {
        return Err(Error::new(Kind::Limit, "global heap is too large"));
    }
    if at.checked_add(size).is_none_or(|end| end > image.len()) {
        return Err(damaged()); // before memory is taken for it
    }
    let mut whole;
    let heap = if size <= start.len() as u64 {
        &start[..size as usize]
    } else {
        whole = crate::error::try_with_capacity(size as usize)?;
        whole.resize(size as usize, 0);
        image.read_at(&mut whole, at)?;
        &whole[..]
    };
    let mut p = 16;
    while p + 16 <= heap.len() {
        let (free, size) = (heap[p] == 0 && heap[p + 1] == 0, number(heap, p + 8));
        let padded = if free { Some(size) } else { size.checked_next_multiple_of(8).and_then(|n| n.checked_add(16)) };
        let left = (heap.len() - p) as u64;
        p += padded.filter(|n| (1..=left).contains(n)).ok_or_else(damaged)? as usize;
    }
    Ok(())
}

/// Calls `f(page offset, range within the page, range within the buffer)` for each page that `[at, at + len)` touches.
fn each_page(at: u64, len: usize, mut f: impl FnMut(u64, std::ops::Range<usize>, std::ops::Range<usize>)) {
    let mut done = 0;
    while done < len {
        let within = ((at + done as u64) % PAGE as u64) as usize;
        let n = (PAGE - within).min(len - done);
        f(at + done as u64 - within as u64, within..within + n, done..done + n);
        done += n;
    }
}

/// `H5FD_t` of HDF5 1.14 to 2.2 (the declaration in hdf5-metno-sys lacks two fields).
#[repr(C)]
struct Public {
    driver: hid_t,
    class: *const c_void,
    serial: c_ulong,
    access_flags: c_uint,
    feature_flags: c_ulong,
    max_address: haddr_t,
    base_address: haddr_t,
    threshold: u64,
    alignment: u64,
    paged: bool,
}

/// One open file, allocated by `open` and freed by `close`.
#[repr(C)]
struct Open {
    public: Public, // first: the library sees only this
    disk: *const Disk<'static>,
    end_of_allocation: Cell<u64>,
}

type Unused = *const c_void;

/// `H5FD_class_t` of HDF5 1.14 to 2.2 (the declaration in hdf5-metno-sys is that of 1.12).
#[repr(C)]
pub(super) struct Class {
    version: c_uint,
    value: c_int,
    name: *const c_char,
    max_address: haddr_t,
    close_degree: c_int,
    terminate_and_superblock: [Unused; 4],
    fapl_size: usize,
    fapl: [Unused; 3],
    dxpl_size: usize,
    dxpl: [Unused; 2],
    open: extern "C" fn(*const c_char, c_uint, hid_t, haddr_t) -> *mut Open,
    close: extern "C" fn(*mut Open) -> herr_t,
    compare: Unused,
    query: extern "C" fn(*const Open, *mut c_ulong) -> herr_t,
    type_map_alloc_free: [Unused; 3],
    get_eoa: extern "C" fn(*const Open, c_int) -> haddr_t,
    set_eoa: extern "C" fn(*mut Open, c_int, haddr_t) -> herr_t,
    get_eof: extern "C" fn(*const Open, c_int) -> haddr_t,
    get_handle: Unused,
    read: extern "C" fn(*mut Open, c_int, hid_t, haddr_t, usize, *mut c_void) -> herr_t,
    write: extern "C" fn(*mut Open, c_int, hid_t, haddr_t, usize, *const c_void) -> herr_t,
    vector_and_selection: [Unused; 4],
    flush_truncate_lock_unlock_delete_control: [Unused; 6],
    free_list_map: [c_int; 7],
}

// As the C compiler lays them out (64-bit Unix; `unsigned long` is shorter on Windows).
#[cfg(all(unix, target_pointer_width = "64"))]
const _: () = assert!(
    size_of::<Public>() == 80
        && size_of::<Class>() == 336
        && std::mem::offset_of!(Class, open) == 120
        && std::mem::offset_of!(Class, read) == 208
        && std::mem::offset_of!(Class, free_list_map) == 304
);

/// The driver. It has no lock callback, so that the library never locks a file, and no compare callback, so that no
/// two opens are taken for the same file.
pub(super) const CLASS: Class = Class {
    version: 1,
    value: 40_961, // free: the HDF Group hands out numbers up to 255, tests use 256 to 511
    name: NAME.as_ptr(),
    max_address: i64::MAX as haddr_t,
    close_degree: 3, // H5F_CLOSE_STRONG
    terminate_and_superblock: [ptr::null(); 4],
    fapl_size: size_of::<*const Disk>(), // the library copies this pointer
    fapl: [ptr::null(); 3],
    dxpl_size: 0,
    dxpl: [ptr::null(); 2],
    open,
    close,
    compare: ptr::null(),
    query,
    type_map_alloc_free: [ptr::null(); 3],
    get_eoa,
    set_eoa,
    get_eof,
    get_handle: ptr::null(),
    read,
    write,
    vector_and_selection: [ptr::null(); 4],
    flush_truncate_lock_unlock_delete_control: [ptr::null(); 6],
    free_list_map: [1, 1, 1, 3, 3, 1, 1], // raw data and metadata apart (H5FD_FLMAP_DICHOTOMY)
};

extern "C" fn open(name: *const c_char, _flags: c_uint, fapl: hid_t, _max: haddr_t) -> *mut Open {
    // SAFETY: the library passes a C string, and the property list in which `Library::open` stored a `*const Disk`; the disk
    // outlives the file (whose `Id` borrows it). The lock is held: the library only calls back from inside a call.
    let (name, disk) = unsafe { (CStr::from_ptr(name), H5Pget_driver_info(fapl).cast::<*const Disk<'static>>()) };
    if disk.is_null() || name != NAME {
        return ptr::null_mut();
    }
    // SAFETY: as above; the library copied the pointer itself, aligned.
    let disk = unsafe { *disk };
    // SAFETY: as above; a `Disk` is only ever shared.
    if unsafe { &*disk }.opened.replace(true) {
        return ptr::null_mut();
    }
    let public = Public {
        driver: 0,
        class: ptr::null(),
        serial: 0,
        access_flags: 0,
        feature_flags: 0,
        max_address: 0,
        base_address: 0,
        threshold: 0,
        alignment: 0,
        paged: false,
    };
    Box::into_raw(Box::new(Open { public, disk, end_of_allocation: Cell::new(0) }))
}

extern "C" fn close(file: *mut Open) -> herr_t {
    // SAFETY: the library closes once what `open` returned.
    drop(unsafe { Box::from_raw(file) });
    0
}

extern "C" fn query(file: *const Open, flags: *mut c_ulong) -> herr_t {
    // Not when reading: every structure is then read by itself, so that `Disk::read` sees where it starts.
    let gather = file.is_null() || disk(file).0.image.is_none();
    if !flags.is_null() {
        let features = if gather { H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA } else { 0 };
        // SAFETY: not null, so the library wants its flags there.
        unsafe { *flags = features.into() };
    }
    0
}

/// The disk behind an open file.
fn disk<'f>(file: *const Open) -> (&'f Disk<'static>, &'f Cell<u64>) {
    // SAFETY: called by the callbacks below with what `open` returned and `close` has not yet freed; the disk lives
    // longer. The library accesses only `public`, from this thread, and not during the callback.
    unsafe { (&*(*file).disk, &(*file).end_of_allocation) }
}

extern "C" fn get_eoa(file: *const Open, _kind: c_int) -> haddr_t {
    disk(file).1.get()
}

extern "C" fn set_eoa(file: *mut Open, _kind: c_int, address: haddr_t) -> herr_t {
    let (disk, end) = disk(file);
    end.set(address);
    disk.end.set(address);
    0
}

extern "C" fn get_eof(file: *const Open, _kind: c_int) -> haddr_t {
    let (disk, _) = disk(file);
    disk.image.map_or_else(|| disk.end.get(), ReadAt::len)
}

extern "C" fn read(file: *mut Open, kind: c_int, _: hid_t, at: haddr_t, len: usize, out: *mut c_void) -> herr_t {
    let (disk, _) = disk(file);
    if len == 0 {
        return 0;
    }
    if let Some(image) = disk.image
        && at.checked_add(len as u64).is_none_or(|end| end > image.len())
    {
        return disk.guard(|| Err(Error::new(Kind::Image, "an address points outside of the file"))); // no memory is touched
    }
    // SAFETY: the library has allocated `len` bytes at `out` for us alone; zeroed first, as it need not have done so.
    let out = unsafe {
        out.write_bytes(0, len);
        std::slice::from_raw_parts_mut(out.cast(), len)
    };
    disk.guard(|| disk.read(kind, at, out))
}

extern "C" fn write(file: *mut Open, _: c_int, _: hid_t, at: haddr_t, len: usize, data: *const c_void) -> herr_t {
    let (disk, _) = disk(file);
    if len == 0 {
        return 0;
    }
    // The library hands on the very memory it is given: that is how a chunk is told from a global heap, which it calls
    // raw data too.
    if disk.chunk.get() == (data, len) {
        disk.placed_at.set(Some(at));
        return 0;
    }
    // SAFETY: the library passes `len` bytes, which do not change during the call.
    let data = unsafe { std::slice::from_raw_parts(data.cast(), len) };
    disk.guard(|| disk.write(at, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BTREE: c_int = H5FD_mem_t::H5FD_MEM_BTREE as c_int;
    const HEADER: c_int = H5FD_mem_t::H5FD_MEM_OHDR as c_int;

    /// A node of a B-tree of chunks of one dimension.
    fn node(level: u8, children: &[u64]) -> Vec<u8> {
        let mut node = b"TREE\x01".to_vec();
        node.push(level);
        node.extend((children.len() as u16).to_le_bytes());
        node.extend([0xff; 16]);
        for child in children {
            node.extend([0; 24]);
            node.extend(child.to_le_bytes());
        }
        node
    }

    fn read(disk: &Disk, kind: c_int, at: u64, len: usize) -> Option<String> {
        disk.read(kind, at, &mut vec![0; len]).err().map(|e| e.to_string())
    }

    #[test]
    fn trees_lead_to_every_place_once() {
        let (root, leaf) = (node(1, &[1000, 2000]), node(0, &[3000, 4000]));
        for (image, wanted) in [
            ([root.clone(), leaf.clone()], None),
            ([root.clone(), node(0, &[3000, 3000])], Some("twice")),
            ([root.clone(), node(0, &[3000, 1000])], Some("twice")),
            ([node(17, &[]), leaf.clone()], Some("too deep")),
        ] {
            let ends = [image[0].len(), image[1].len()];
            let image = image.concat();
            let disk = Disk::over(&image);
            disk.expect_rank(1);
            let found = read(&disk, BTREE, 0, ends[0]).or_else(|| read(&disk, BTREE, ends[0] as u64, ends[1]));
            assert_eq!(found.is_some(), wanted.is_some(), "{found:?}");
            assert!(found.is_none_or(|e| e.contains(wanted.unwrap_or_default())));
            if wanted.is_none() {
                assert_eq!(read(&disk, BTREE, 0, ends[0]), None, "the library reads some nodes again");
            }
        }
        let image = node(0, &[7, 7]);
        assert_eq!(read(&Disk::over(&image), H5FD_mem_t::H5FD_MEM_DRAW as c_int, 0, image.len()), None, "values");
    }

    #[test]
    fn numbers_of_entries_are_bounded() {
        let header = |signature: &[u8], at: usize, n: u64| {
            let mut bytes = signature.to_vec();
            bytes.resize(at, 0);
            bytes.extend(n.to_le_bytes());
            bytes
        };
        for (n, fine) in [(0, true), (limits::MAX_EMPTY_CHUNKS, true), (1 << 40, false), (u64::MAX, false)] {
            for (signature, at) in [(b"FAHD", 8), (b"EAHD", 44)] {
                let image = header(signature, at, n);
                assert_eq!(read(&Disk::over(&image), HEADER, 0, image.len()).is_none(), fine, "{n}");
            }
        }
        for (depth, fine) in [(0, true), (16, true), (17, false), (0xffff, false)] {
            let image = header(b"BTHD", 12, depth);
            assert_eq!(read(&Disk::over(&image), BTREE, 0, image.len()).is_none(), fine, "{depth}");
        }
    }
}
