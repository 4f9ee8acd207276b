//! placeholder
use crate::error::Result;
use crate::h5::{Engine, Index, Layout};
use crate::io::ReadAt;
use crate::tree::Tree;
/// placeholder
#[derive(Debug)]
pub struct LibHdf5;
impl Engine for LibHdf5 {
    fn name(&self) -> &'static str { "libhdf5" }
    fn lay_out(&self, _: &Tree) -> Result<Layout> { unimplemented!() }
    fn index(&self, _: &dyn ReadAt) -> Result<Index> { unimplemented!() }
    fn read(&self, _: &dyn ReadAt, _: &[&str], _: &mut [&mut [u8]]) -> Result<()> { unimplemented!() }
}
