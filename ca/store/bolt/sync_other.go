//go:build !linux

package bolt

// Sync makes the file durable.
func (f dataFile) Sync() error { return f.File.Sync() }
