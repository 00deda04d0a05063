//go:build !linux

package unixpeer

import (
	"errors"
	"net"
)

// Config is what a Listener is made of.
type Config struct {
	CgroupRoot string
	Refused    func(err error)
}

// Listener is for Linux alone.
type Listener struct{}

var errLinux = errors.New("whose process connects can be told on Linux alone")

// New says that it is for Linux alone.
func New(*net.UnixListener, Config) (*Listener, error) { return nil, errLinux }

// Accept returns an error.
func (*Listener) Accept() (net.Conn, string, error) { return nil, "", errLinux }

// Close does nothing.
func (*Listener) Close() error { return nil }
