package inbound

import (
	"encoding/binary"
	"math"
)

const (
	// chunk is how finely it is known what of a stream has been read, in bytes; chunks times as much is looked back: what a
	// stream's window of 64 KiB holds, and a message that the server has widened it for.
	chunk  = 2 << 10
	chunks = 64
)

// unread counts the frames with content that came on a stream and that a gRPC server may not have read yet. It reads in
// their order, and tells how far it is by widening the stream's window, each time that it has read a quarter of it.
type unread struct {
	came, length int // of the frames' content, and with their padding, which counts for the window too
	widened      int
	frames       int  // all that chunks hold
	begun        bool // a frame has, of which nothing came yet
	cleared      int  // chunks that were read whole
	chunks       [chunks]uint16
}

// frame notes the length of a frame that begins.
func (u *unread) frame(length int) {
	u.length += length
	u.begun = true
}

// content notes a piece of what it brings. A frame without any is not kept.
func (u *unread) content(n int) {
	if at := &u.chunks[u.came/chunk%chunks]; u.begun && *at < math.MaxUint16 {
		*at++
		u.frames++
	}
	u.begun = false
	u.came += n
}

// widen is the server's word that it takes n bytes more. Padding is let in again at once, so it is taken off.
func (u *unread) widen(n int) {
	u.widened += n
	read := u.widened - (u.length - u.came)
	for ; (u.cleared+1)*chunk <= min(read, u.came); u.cleared++ {
		at := &u.chunks[u.cleared%chunks]
		u.frames -= int(*at)
		*at = 0
	}
}

// increment is the number in a WINDOW_UPDATE frame, of which the bytes come one by one.
type increment struct {
	raw  [4]byte
	have int
}

func (i *increment) add(p []byte) {
	i.have += copy(i.raw[i.have:], p)
}

// take returns it, and is ready for the next.
func (i *increment) take() int {
	n := binary.BigEndian.Uint32(i.raw[:]) &^ (1 << 31)
	*i = increment{}
	return int(n)
}
