//! The background reader: how far it runs ahead, who reads what, what an interrupt and an error do.

mod common;

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use common::{Values, WAIT, small_tree, to_memory};
use hornbeam::archive::read::Members;
use hornbeam::error::{Error, Kind, Result};
use hornbeam::io::ReadAt;
use hornbeam::io::fetch::{Extent, Fetch, Request};
use hornbeam::load::{self, Choice, Weights};

/// Zeros without end that note how far they were read.
#[derive(Default)]
struct Zeros {
    read: AtomicU64,
    taken: AtomicU64,
    lead: AtomicU64,
}

impl ReadAt for Zeros {
    fn len(&self) -> u64 {
        1 << 50
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.fill(0);
        let end = self.read.fetch_max(offset + buf.len() as u64, Ordering::SeqCst).max(offset + buf.len() as u64);
        self.lead.fetch_max(end.saturating_sub(self.taken.load(Ordering::SeqCst)), Ordering::SeqCst);
        Ok(())
    }
}

const MIB: u64 = 1 << 20;

fn request(source: Arc<dyn ReadAt>, len: u64, tensors: Vec<Extent>, read_ahead: u64) -> Request {
    let decode = Box::new(|_: &dyn ReadAt, _: &[usize], _: &mut [&mut [u8]]| Ok(()));
    Request { source, image: Extent { offset: 0, len }, tensors, decoded: vec![], decode, crc: None, read_ahead }
}

#[test]
fn the_reader_runs_ahead_by_no_more_than_it_may() {
    let source = Arc::new(Zeros::default());
    let tensors: Vec<_> = (0..64).map(|i| Extent { offset: i * MIB, len: MIB }).collect();
    let fetch = Fetch::start(request(source.clone(), 64 * MIB, tensors, 4 * MIB)).unwrap();
    for i in 0..64 {
        source.taken.store((i + 1) * MIB, Ordering::SeqCst); // about to be
        let slot = fetch.take(i as usize, WAIT).unwrap().unwrap();
        // Enough work that a reader without a limit would be at the end.
        assert_eq!(crc32fast::hash(&vec![0; 8 << 20]), crc32fast::hash(&vec![0; 8 << 20]));
        assert!(slot.bytes().iter().all(|&b| b == 0));
    }
    fetch.complete(WAIT).unwrap();
    let lead = source.lead.load(Ordering::SeqCst);
    assert!(lead <= 5 * MIB, "{lead} bytes ahead"); // the limit, and the tensor that reaches it
    assert!(lead >= 2 * MIB, "it never ran ahead");
}

/// Tensors to be decoded: `n` of one MiB each, filled with their number; those in `bad` fail. Notes what was decoded.
fn decoding(n: usize, bad: &'static [usize], read_ahead: u64) -> (Request, Arc<Mutex<Vec<Vec<usize>>>>) {
    let batches = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&batches);
    let decode = move |source: &dyn ReadAt, numbers: &[usize], out: &mut [&mut [u8]]| {
        source.read_at(&mut [0], 0)?;
        noted.lock().unwrap().push(numbers.to_vec());
        for (&i, out) in numbers.iter().zip(out) {
            if bad.contains(&i) {
                return Err(Error::new(Kind::Image, "chunk is damaged"));
            }
            out.fill(i as u8);
        }
        Ok(())
    };
    let plain = vec![Extent { offset: 0, len: 10 }, Extent { offset: 10, len: 10 }];
    let decoded = vec![MIB; n];
    (Request { decoded, decode: Box::new(decode), ..request(Arc::new(vec![9u8; 20]), 20, plain, read_ahead) }, batches)
}

#[test]
fn decoded_tensors_are_read_ahead_like_others() {
    for read_ahead in [0, 3 * MIB, u64::MAX] {
        for step in [1, 7] {
            let (request, batches) = decoding(64, &[], read_ahead);
            let fetch = Fetch::start(request).unwrap();
            for i in 0..64 {
                let i = i * step % 64;
                let slot = fetch.take(i + 2, WAIT).unwrap().unwrap();
                assert!(slot.len == MIB as usize && slot.bytes().iter().all(|&b| b == i as u8));
                assert!(fetch.take(i + 2, WAIT).unwrap().is_none(), "taken twice");
            }
            assert_eq!(fetch.take(1, WAIT).unwrap().unwrap().bytes(), [9; 10]);
            fetch.complete(WAIT).unwrap();
            let batches = batches.lock().unwrap();
            let mut all = batches.concat();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..64), "each once");
            let most = batches.iter().map(Vec::len).max().unwrap();
            assert!(most as u64 <= (read_ahead / MIB).clamp(1, 32), "{most} at a time");
        }
    }
}

#[test]
fn complete_decodes_everything_and_drain_nothing_more() {
    let (request, batches) = decoding(100, &[], 0);
    let fetch = Fetch::start(request).unwrap();
    fetch.complete(WAIT).unwrap();
    assert_eq!(batches.lock().unwrap().concat().len(), 100);
    for i in (0..100).rev() {
        assert_eq!(fetch.take(i + 2, WAIT).unwrap().unwrap().bytes()[7], i as u8);
    }

    let (request, batches) = decoding(100, &[], 0);
    let fetch = Fetch::start(request).unwrap();
    assert!(fetch.take(50 + 2, WAIT).unwrap().is_some());
    fetch.drain(WAIT).unwrap();
    assert_eq!(*batches.lock().unwrap(), [[50]]);

    let (request, _) = decoding(100, &[99], u64::MAX);
    let error = Fetch::start(request).unwrap().complete(WAIT).unwrap_err();
    assert!(error.to_string().contains("chunk is damaged"), "{error}");
    drop(Fetch::start(decoding(1000, &[], u64::MAX).0).unwrap()); // stops
}

#[test]
fn tensors_are_taken_in_any_order_and_once() {
    let data: Vec<u8> = (0..3 * MIB).map(|i| ((i * 7) >> 3) as u8).collect();
    let edges = [0, 1, 64, 1000, MIB - 1, MIB, MIB + 70_000, 3 * MIB];
    let mut tensors: Vec<_> = edges.windows(2).map(|e| Extent { offset: e[0], len: e[1] - e[0] }).collect();
    tensors.insert(3, Extent { offset: 500, len: 0 });
    tensors.swap(0, 5);
    let crc = crc32fast::hash(&data);
    for read_ahead in [0, 1, 100_000, u64::MAX] {
        for rotate in 0..tensors.len() {
            let source: Arc<dyn ReadAt> = Arc::new(data.clone());
            let whole = Request { crc: Some(crc), ..request(source, 3 * MIB, tensors.clone(), read_ahead) };
            let fetch = Fetch::start(whole).unwrap();
            let mut order: Vec<usize> = (0..tensors.len()).rev().collect();
            order.rotate_left(rotate);
            for &i in &order {
                let Extent { offset, len } = tensors[i];
                let slot = fetch.take(i, WAIT).unwrap();
                let found = slot.as_ref().map_or(&[][..], |s| s.bytes());
                assert_eq!(found, &data[offset as usize..(offset + len) as usize]);
                assert!(fetch.take(i, WAIT).unwrap().is_none(), "taken twice");
            }
            fetch.complete(WAIT).unwrap();
        }
    }
}

#[test]
fn what_is_not_wanted_still_passes_the_checksum() {
    let data: Vec<u8> = (0..MIB).map(|i| (i % 251) as u8).collect();
    let tensors = vec![Extent { offset: 100, len: 50 }];
    for (damage, wanted) in [(None, true), (Some(0), false), (Some(120), false), (Some(MIB - 1), false)] {
        let mut bytes = data.clone();
        damage.into_iter().for_each(|at: u64| bytes[at as usize] ^= 1);
        for drop_rest in [true, false] {
            let source: Arc<dyn ReadAt> = Arc::new(bytes.clone());
            let crc = Some(crc32fast::hash(&data));
            let fetch = Fetch::start(Request { crc, ..request(source, MIB, tensors.clone(), 0) }).unwrap();
            let done = if drop_rest { fetch.drain(WAIT) } else { fetch.complete(WAIT) };
            assert_eq!(done.is_ok(), wanted, "{damage:?}");
            if let Err(e) = done {
                assert!(matches!(e.kind(), Kind::Crc), "{e}");
                assert!(fetch.complete(WAIT).is_err(), "the second question is answered differently");
            }
            if !drop_rest {
                assert_eq!(fetch.take(0, WAIT).unwrap().unwrap().bytes().len(), 50);
            }
        }
    }
}

#[test]
fn dropping_stops_the_reader_in_the_middle_of_a_run() {
    // A terabyte that belongs to no tensor: to read it all would take minutes.
    let source = Arc::new(Zeros::default());
    let fetch = Fetch::start(Request { crc: Some(1), ..request(source.clone(), 1 << 40, vec![], u64::MAX) }).unwrap();
    while source.read.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    drop(fetch);
    assert!(source.read.load(Ordering::SeqCst) < 1 << 40);
    assert_eq!(Arc::strong_count(&source), 1, "the reader still holds its file");
}

#[test]
fn an_interrupt_ends_the_wait_and_an_error_reaches_whoever_asks() {
    struct Fails(u64);
    impl ReadAt for Fails {
        fn len(&self) -> u64 {
            1 << 30
        }

        fn read_at(&self, _: &mut [u8], offset: u64) -> Result<()> {
            if offset >= self.0 {
                Err(Error::new(Kind::Io(std::io::Error::from_raw_os_error(5)), "disk"))
            } else {
                Ok(())
            }
        }
    }
    let tensors: Vec<_> = (0..4).map(|i| Extent { offset: i * MIB, len: MIB }).collect();
    let fetch = Fetch::start(request(Arc::new(Fails(2 * MIB)), 4 * MIB, tensors.clone(), u64::MAX)).unwrap();
    assert!(fetch.take(0, WAIT).unwrap().is_some());
    let error = fetch.take(3, WAIT).unwrap_err();
    assert!(matches!(error.kind(), Kind::Io(e) if e.raw_os_error() == Some(5)), "{error}");
    assert!(fetch.take(2, WAIT).is_err() || fetch.complete(WAIT).is_err());
    assert!(fetch.take(1, WAIT).unwrap().is_some(), "what was read before stays");

    let stop = || Err(Error::new(Kind::Cancelled, "interrupted"));
    let fetch = Fetch::start(Request {
        crc: Some(1),
        ..request(Arc::new(Zeros::default()), 1 << 40, vec![Extent { offset: (1 << 40) - 1, len: 1 }], u64::MAX)
    });
    let error = fetch.unwrap().take(0, &stop).unwrap_err();
    assert!(matches!(error.kind(), Kind::Cancelled), "{error}");
}

/// Bytes that the reader's thread gets only when the gate is open; what others get, `for_others` says.
struct Gated<F> {
    data: Vec<u8>,
    open: Mutex<bool>,
    changed: Condvar,
    for_others: F,
}

impl<F: Fn() -> Result<()>> Gated<F> {
    fn open_gate(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

impl<F: Fn() -> Result<()> + Send + Sync> ReadAt for Gated<F> {
    fn len(&self) -> u64 {
        self.data.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if std::thread::current().name() == Some("hornbeam-fetch") {
            drop(self.changed.wait_while(self.open.lock().unwrap(), |open| !*open).unwrap());
        } else {
            (self.for_others)()?;
        }
        self.data[..].read_at(buf, offset)
    }
}

/// 40 MiB in tensors large and small, with gaps, read through a closed gate.
fn gated<F: Fn() -> Result<()> + Send + Sync + 'static>(for_others: F) -> (Arc<Gated<F>>, Request) {
    let data: Vec<u8> = (0..40 * MIB).map(|i| ((i * 7) >> 5) as u8).collect();
    let mut tensors = vec![Extent { offset: 5, len: 11 * MIB + 3 }, Extent { offset: 12 * MIB, len: 4 * MIB }];
    tensors.extend((0..220).map(|i| Extent { offset: 17 * MIB + i * 100_000, len: 99_000 }));
    let crc = Some(crc32fast::hash(&data));
    let source = Arc::new(Gated { data, open: Mutex::new(false), changed: Condvar::new(), for_others });
    (Arc::clone(&source), Request { crc, ..request(source, 40 * MIB, tensors, u64::MAX) })
}

/// Opens the gate at the end, also of a test that fails: the reader's thread is waited for.
struct Opened<'a, F: Fn() -> Result<()>>(&'a Gated<F>);

impl<F: Fn() -> Result<()>> Drop for Opened<'_, F> {
    fn drop(&mut self) {
        self.0.open_gate();
    }
}

/// Waits for long, but not for ever.
fn patience() -> impl Fn() -> Result<()> {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    move || if std::time::Instant::now() < end { Ok(()) } else { Err(Error::new(Kind::Cancelled, "nobody helped")) }
}

#[test]
fn whoever_waits_reads_the_rest() {
    for drop_rest in [false, true] {
        let (source, request) = gated(|| Ok(()));
        let tensors = request.tensors.clone();
        let fetch = Fetch::start(request).unwrap();
        let opened = Opened(&*source);
        // The reader has one part at most, the first 4 MiB; this tensor is in the last one.
        let last = tensors.len() - 1;
        let slot = fetch.take(last, &patience()).unwrap().unwrap();
        drop(opened);
        if drop_rest { fetch.drain(WAIT) } else { fetch.complete(WAIT) }.unwrap();
        let is =
            |i: usize, bytes: &[u8]| bytes == &source.data[tensors[i].offset as usize..][..tensors[i].len as usize];
        assert!(is(last, slot.bytes()));
        for i in (0..last).filter(|_| !drop_rest) {
            assert!(is(i, fetch.take(i, WAIT).unwrap().unwrap().bytes()), "{i}");
        }
    }
}

#[test]
fn what_an_interrupted_helper_leaves_is_read_by_others() {
    let slow = AtomicBool::new(true);
    let (source, request) = gated(move || {
        let since = std::time::Instant::now();
        // Longer than a waiter waits before it asks whether to go on.
        while slow.load(Ordering::SeqCst) && since.elapsed() < 2 * hornbeam::io::fetch::POLL {
            std::thread::yield_now();
        }
        slow.store(false, Ordering::SeqCst);
        Ok(())
    });
    let tensors = request.tensors.clone();
    let fetch = Fetch::start(request).unwrap();
    let opened = Opened(&*source);
    let stop = || Err(Error::new(Kind::Cancelled, "interrupted"));
    let error = fetch.take(tensors.len() - 1, &stop).unwrap_err();
    assert!(matches!(error.kind(), Kind::Cancelled), "{error}");
    drop(opened);
    fetch.complete(WAIT).unwrap();
    for (i, &Extent { offset, len }) in tensors.iter().enumerate() {
        let slot = fetch.take(i, WAIT).unwrap().unwrap();
        assert_eq!(slot.bytes(), &source.data[offset as usize..(offset + len) as usize], "{i}");
    }
}

#[test]
fn an_error_of_a_helper_is_the_outcome() {
    for crc in [true, false] {
        let failed = Arc::new(AtomicBool::new(false));
        let noted = Arc::clone(&failed);
        let (source, request) = gated(move || {
            noted.store(true, Ordering::SeqCst);
            Err(Error::new(Kind::Io(std::io::Error::from_raw_os_error(5)), "disk"))
        });
        let fetch = Fetch::start(Request { crc: request.crc.filter(|_| crc), ..request }).unwrap();
        let opened = Opened(&*source);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| fetch.take(100, &patience()).map(|_| ()));
            while !failed.load(Ordering::SeqCst) && !waits.is_finished() {
                std::thread::yield_now();
            }
            drop(opened); // the reader has its part, and finds nothing more to do
            let error = waits.join().unwrap().unwrap_err();
            assert!(matches!(error.kind(), Kind::Io(e) if e.raw_os_error() == Some(5)), "{error}");
            assert!(fetch.complete(WAIT).is_err());
        });
    }
}

#[test]
fn an_error_of_a_background_worker_beside_a_helping_caller_is_an_error() {
    #[derive(Default)]
    struct Source {
        step: Mutex<usize>, // 1: both read; 2: the background worker has failed
        changed: Condvar,
        hashed: AtomicBool,
    }
    impl ReadAt for Source {
        fn len(&self) -> u64 {
            16 * MIB
        }

        fn read_at(&self, buf: &mut [u8], _: u64) -> Result<()> {
            buf.fill(0);
            let step = self.step.lock().unwrap();
            if std::thread::current().name() == Some("hornbeam-fetch") {
                let mut step = self.changed.wait_while(step, |s| *s < 1).unwrap();
                *step = 2;
                self.changed.notify_all();
                return Err(Error::new(Kind::Io(std::io::Error::from_raw_os_error(5)), "disk"));
            }
            let mut step = step;
            if *step == 0 {
                *step = 1;
                self.changed.notify_all();
            }
            drop(self.changed.wait_while(step, |s| *s < 2).unwrap());
            // Long enough that the worker could have said that all is over.
            while !self.hashed.swap(true, Ordering::SeqCst) {
                assert_eq!(crc32fast::hash(&vec![0; 64 << 20]), crc32fast::hash(&vec![0; 64 << 20]));
            }
            Ok(())
        }
    }
    for last in [true, false] {
        let source = Arc::new(Source::default());
        let tensors = vec![Extent { offset: 0, len: 16 * MIB }];
        let fetch = Fetch::start(request(source, 16 * MIB, tensors, u64::MAX)).unwrap();
        let error = if last { fetch.take(0, WAIT).map(drop) } else { fetch.complete(WAIT) }.unwrap_err();
        assert!(matches!(error.kind(), Kind::Io(e) if e.raw_os_error() == Some(5)), "{error}");
        assert!(fetch.complete(WAIT).is_err());
    }
}

/// A source with a fault.
struct Faulty;

impl ReadAt for Faulty {
    fn len(&self) -> u64 {
        4 * MIB
    }

    fn read_at(&self, _: &mut [u8], _: u64) -> Result<()> {
        panic!("a fault of the source")
    }
}

#[test]
fn a_panic_of_a_reader_is_an_error_of_our_own() {
    let tensors = vec![Extent { offset: 0, len: MIB }, Extent { offset: MIB, len: 3 * MIB }];
    let fetch = Fetch::start(request(Arc::new(Faulty), 4 * MIB, tensors, 0)).unwrap();
    let error = loop {
        // Whoever waits reads too, and panics itself; the reader's own thread hands on an error.
        if let Ok(outcome) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| fetch.complete(WAIT))) {
            break outcome.unwrap_err();
        }
    };
    assert!(matches!(error.kind(), Kind::Internal), "{error}");
}

#[test]
fn tensors_that_overlap_or_leave_the_image_are_refused() {
    let e = |offset, len| Extent { offset, len };
    let refused = [
        vec![e(0, 10), e(9, 5)],
        vec![e(0, 10), e(0, 10)],
        vec![e(50, 51)],
        vec![e(101, 1)],
        vec![e(u64::MAX, 2)],
        vec![e(1, u64::MAX)],
    ];
    for tensors in refused {
        let started = Fetch::start(request(Arc::new(vec![0; 100]), 100, tensors.clone(), 0));
        assert!(matches!(started.err().map(Error::into_kind), Some(Kind::Image)), "{tensors:?}");
    }
    for tensors in [vec![e(0, 10), e(10, 90)], vec![e(100, 0)], vec![]] {
        Fetch::start(request(Arc::new(vec![0; 100]), 100, tensors, 0)).unwrap().complete(WAIT).unwrap();
    }
}

#[test]
fn a_part_of_a_file_is_read_where_it_is() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let tree = small_tree();
    let (bytes, _) = to_memory(&tree, Values::of(&tree, 3), true, true, b"");
    file.write_all(&bytes).unwrap();
    let source = load::open(file.path()).unwrap();
    let members = Members::open(&*source).unwrap();
    let weights = Arc::new(Weights::open_member(&source, &members, Choice::Direct).unwrap());
    for (i, d) in weights.index().datasets.iter().enumerate() {
        let whole = weights.read_part(i, 0, d.nbytes, WAIT).unwrap();
        match weights.offset(i) {
            Some(at) => assert_eq!(whole.bytes(), &bytes[at as usize..][..d.nbytes as usize]),
            None => assert_eq!(d.nbytes, 0),
        }
        let error = weights.read_part(i, 1, 0, WAIT).unwrap_err().to_string();
        assert!(error.contains(&d.path), "{error}");
    }
}
