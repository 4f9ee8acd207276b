//! Every interleaving of workers that `shuttle` finds: no wake-up is lost, errors arrive, and all bytes are right. Time
//! does not pass here, so whoever is not woken waits for ever, which `shuttle` reports as a deadlock.

use std::sync::Arc;

use shuttle::thread;

use super::plan::plan;
use super::{Extent, Fetch, Interrupt, Request};
use crate::error::{Error, Kind, Result};
use crate::io::ReadAt;

const WAIT: Interrupt<'_> = &|| Ok(());
const TRIES: usize = 1000;

struct Source {
    bytes: Vec<u8>,
    bad: Option<u64>, // reads that reach this offset fail
}

impl ReadAt for Source {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        thread::yield_now();
        if self.bad.is_some_and(|bad| (offset..offset + buf.len() as u64).contains(&bad)) {
            return Err(Error::new(Kind::Io(std::io::Error::from_raw_os_error(5)), "disk"));
        }
        self.bytes[..].read_at(buf, offset)
    }
}

const LEN: u64 = 1500;
const LARGE: usize = 4;

fn extent(i: usize) -> Extent {
    let start = i as u64 * 100 + if i > LARGE { 600 } else { 0 };
    Extent { offset: start, len: if i == LARGE { 690 } else { 90 } }
}

/// Nine tensors, of which one is read in three parts, gaps of 10 bytes between them, and three tensors to be decoded.
fn request(bad: Option<u64>, read_ahead: u64) -> Request {
    let bytes: Vec<u8> = (0..LEN).map(|i| (i * 7 % 251) as u8).collect();
    let crc = Some(crc32fast::hash(&bytes));
    let decode = |source: &dyn ReadAt, numbers: &[usize], out: &mut [&mut [u8]]| {
        for (&i, out) in numbers.iter().zip(out) {
            source.read_at(out, i as u64)?;
        }
        Ok(())
    };
    Request {
        source: Arc::new(Source { bytes, bad }),
        image: Extent { offset: 0, len: LEN },
        tensors: (0..9).map(extent).collect(),
        decoded: vec![90; 3],
        decode: Box::new(decode),
        crc,
        read_ahead,
    }
}

fn start(request: Request, workers: usize) -> Fetch {
    // As small parts as there are, so that there are many of them to be claimed.
    let plan = plan(&request.tensors, request.image.len, request.crc.is_some(), 1).unwrap();
    assert_eq!(plan.len(), 20);
    Fetch::with_workers(request, plan, workers).unwrap()
}

fn expected(i: usize) -> Vec<u8> {
    let Extent { offset, len } = if i < 9 { extent(i) } else { Extent { offset: i as u64 - 9, len: 90 } };
    (offset..offset + len).map(|i| (i * 7 % 251) as u8).collect()
}

fn check(f: impl Fn() + Send + Sync + 'static) {
    shuttle::check_random(f, TRIES);
}

#[test]
fn several_callers_take_everything_in_any_order() {
    for workers in [0, 1, 3] {
        for read_ahead in [0, 200, u64::MAX] {
            check(move || {
                let fetch = Arc::new(start(request(None, read_ahead), workers));
                let take = |order: Vec<usize>| {
                    let fetch = Arc::clone(&fetch);
                    thread::spawn(move || {
                        for i in order {
                            assert_eq!(fetch.take(i, WAIT).unwrap().unwrap().bytes(), expected(i));
                        }
                    })
                };
                let threads = [take((0..12).step_by(2).collect()), take((0..12).rev().step_by(2).collect())];
                threads.into_iter().for_each(|t| t.join().unwrap());
                fetch.complete(WAIT).unwrap();
            });
        }
    }
}

#[test]
fn an_error_in_any_thread_is_everybodys_and_the_outcome() {
    for workers in [0, 1, 2] {
        for at in [50, 450, 700, 1499] {
            check(move || {
                let fetch = Arc::new(start(request(Some(at), u64::MAX), workers));
                let other = Arc::clone(&fetch);
                let other = thread::spawn(move || {
                    for i in [LARGE, 8] {
                        match other.take(i, WAIT) {
                            Ok(slot) => assert_eq!(slot.unwrap().bytes(), expected(i)),
                            Err(e) => assert!(matches!(e.kind(), Kind::Io(_)), "{e}"),
                        }
                    }
                });
                let error = fetch.complete(WAIT).unwrap_err();
                assert!(matches!(error.kind(), Kind::Io(_)), "{error}");
                other.join().unwrap();
                assert!(fetch.complete(WAIT).is_err(), "the second question is answered differently");
            });
        }
    }
}

#[test]
fn what_an_interrupted_caller_had_claimed_is_read_by_others() {
    for workers in [0, 1] {
        check(move || {
            let fetch = Arc::new(start(request(None, 200), workers));
            let other = Arc::clone(&fetch);
            let other = thread::spawn(move || {
                let stop = || Err(Error::new(Kind::Cancelled, "interrupted"));
                other.take(7, &stop).map(drop)
            });
            assert_eq!(fetch.take(8, WAIT).unwrap().unwrap().bytes(), expected(8));
            if let Err(error) = other.join().unwrap() {
                assert!(matches!(error.kind(), Kind::Cancelled), "{error}");
            }
            fetch.complete(WAIT).unwrap();
        });
    }
}

#[test]
fn a_dropped_read_stops_and_lets_go_of_its_file() {
    for workers in [0, 1, 3] {
        check(move || {
            let request = request(None, 200);
            let source = Arc::clone(&request.source);
            let fetch = start(request, workers);
            assert_eq!(fetch.take(10, WAIT).unwrap().unwrap().bytes(), expected(10));
            drop(fetch);
            assert_eq!(Arc::strong_count(&source), 1);
        });
    }
}

#[test]
fn draining_reads_to_the_end_and_finds_a_wrong_checksum() {
    for workers in [0, 2] {
        for wrong in [0, 1] {
            check(move || {
                let request = request(None, 0);
                let crc = request.crc.map(|crc| crc ^ wrong);
                let fetch = Arc::new(start(Request { crc, ..request }, workers));
                let other = Arc::clone(&fetch);
                let other = thread::spawn(move || other.take(3, WAIT).is_ok());
                let drained = fetch.drain(WAIT);
                assert_eq!(drained.is_ok(), wrong == 0);
                if let Err(error) = drained {
                    // The error is returned once; the other caller may have been first.
                    assert!(matches!(error.kind(), Kind::Crc | Kind::Io(_)), "{error}");
                }
                other.join().unwrap();
            });
        }
    }
}
