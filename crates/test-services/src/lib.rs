//! Real servers that tests need, started by the tests themselves: [`postgres`], [`hostile_agent`]. [`on_both`]: the same
//! tests on both databases.
//!
//! Each lives as long as the test binary that asked for it, whichever way that ends, and leaves nothing behind.
#![forbid(unsafe_code)]

pub mod hostile_agent;
pub mod postgres;

/// Makes two tests of each function: with a `Place::sqlite()` of the module it stands in, and a `Place::postgres().await`.
#[macro_export]
macro_rules! on_both {
    ($($name:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $name() {
                super::$name(super::Place::sqlite()).await
            })+
        }
        mod postgres {
            $(#[tokio::test]
            async fn $name() {
                super::$name(super::Place::postgres().await).await
            })+
        }
    };
}
