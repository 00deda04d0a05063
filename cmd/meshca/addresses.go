package main

import (
	"fmt"
	"net"
	"strconv"
)

// checkAddresses refuses listeners that cannot be opened, or not both at once.
func (c *Config) checkAddresses() error {
	listen, err := parseAddress("listen", c.Listen)
	if err != nil {
		return err
	}
	ops, err := parseAddress("opsAddress", c.OpsAddress)
	if err != nil {
		return err
	}
	if listen.overlaps(ops) {
		return fmt.Errorf("opsAddress: %s and listen (%s) are the same port: give each a port of its own", c.OpsAddress, c.Listen)
	}
	return nil
}

// address is where to listen: a host, nil for every one, and a port, 0 for any that is free.
type address struct {
	host string
	ip   net.IP
	port uint16
}

func parseAddress(key, s string) (address, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return address{}, fmt.Errorf("%s: %w: write it like \":8443\"", key, err)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return address{}, fmt.Errorf("%s: %q in %q is no port: a number from 0 (any that is free) to 65535", key, port, s)
	}
	if host == "localhost" {
		host = "127.0.0.1"
	}
	return address{host: host, ip: net.ParseIP(host), port: uint16(n)}, nil
}

// everywhere tells whether it listens on every address of the machine.
func (a address) everywhere() bool { return a.host == "" || a.ip.IsUnspecified() }

func (a address) overlaps(b address) bool {
	return a.port != 0 && a.port == b.port &&
		(a.everywhere() || b.everywhere() || a.host == b.host || a.ip != nil && a.ip.Equal(b.ip))
}
