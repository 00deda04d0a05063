//go:build !linux

// Package selinux labels what pods share with the agent.
package selinux

// Label does nothing: this system has no SELinux.
func Label(string) error { return nil }
