//! `checkout-worker`: see the library's documentation.

use std::process::ExitCode;

fn main() -> ExitCode {
    creem_checkout_worker::cli::main()
}
