//go:build !linux

package bolt

// sync makes the file durable.
func (f dataFile) sync() error { return f.File.Sync() }
