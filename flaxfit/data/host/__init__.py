"""Operations on host arrays: conversion, checks, weights and padding."""
