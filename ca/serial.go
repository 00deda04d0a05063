package ca

import (
	"fmt"
	"math/big"
)

// SerialString is how serials are written everywhere for people and programs: lower-case hex, at least the 32 digits of
// our own 128-bit serials, so that leading zeros do not make two spellings of one.
func SerialString(n *big.Int) string { return fmt.Sprintf("%032x", n) }
